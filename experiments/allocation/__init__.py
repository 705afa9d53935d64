"""How far does more memory carry?"""
