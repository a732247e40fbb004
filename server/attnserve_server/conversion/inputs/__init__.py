"""What a graph's inputs are, and made-up ones to run it on."""
