"""The zoo: small seeded models, one for each form of attention, generated during export."""
