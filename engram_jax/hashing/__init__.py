"""Tokens to row ids."""
