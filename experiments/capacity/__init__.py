"""How many facts does a parameter hold?"""
