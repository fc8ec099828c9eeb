"""The front door: decides what is played next, keeps the books, answers people and programs. Never
touches a model.
"""
