"""The optimizers in other libraries' trainers: a module for each library, which needs the extra of that name.

`import steepest` imports none of them, and none changes a class of its library.
"""
