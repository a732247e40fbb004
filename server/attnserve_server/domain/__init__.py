"""Frozen values, the error tree and the clock port. Imports no other room, and of libraries only numpy."""
