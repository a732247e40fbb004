"""The zoo: small seeded models, one for each pattern of attention, generated during export."""
