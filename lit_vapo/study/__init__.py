"""Studies of repeated runs: is the return less variable, and the risk of ending worse lower?"""
