"""Does a rate that is best for a short run suit a longer one?"""
