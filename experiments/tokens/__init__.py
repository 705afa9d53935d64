"""Do our disagreements with the paper shrink as models are trained?"""
