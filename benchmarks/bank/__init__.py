"""A bank of small random training tasks on which policies that tune the learning rate are judged.

One integer gives one task: a family of problems, an optimizer, a batch size, a number of steps and perhaps a warm-up,
all drawn at random but repeatably (``tasks.make``). ``lab.Lab`` runs any piece of such a training at any rates from any
state, ``oracle`` holds the best that a fixed schedule reaches, and ``split`` says which tasks are kept away from every
choice.
"""
