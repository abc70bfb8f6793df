"""The ground of the lessons of docs/learn/: a tiny language, tiny models of it, and pictures of curves.

language    guests' reviews of a café: 24 words, a grammar, and a rule that says how kind a review is
models      a network of 70,000 weights, its first training, and samples of it
course      shows the source of a function, draws curves over the expected ones, checks answers to exercises
pages       reads a lesson: its cells, as a program and as a Jupyter notebook
"""
