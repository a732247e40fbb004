"""What every room of conversion shares: sites, tolerances, errors and progress."""
