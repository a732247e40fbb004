"""Recognise the cache of a decoder, and split its graph into one for whole sequences and one for supplied pasts."""
