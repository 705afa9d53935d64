"""Which settings does each kind of memory do best with?"""
