"""What every other room of conversion builds on: site types, error measures and tolerances, errors, progress."""
