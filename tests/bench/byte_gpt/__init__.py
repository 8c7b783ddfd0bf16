"""Small GPTs over bytes that train for 400 steps, most of them with a fault.

``recipes`` says what to train, ``model`` builds it, ``faults`` makes it fail, ``train`` trains it
(watched, guarded, or neither), ``runs`` trains many and keeps them, ``outcome`` decides from losses
alone whether and when a run failed and whether attention was to blame, and ``cases`` gives each
with its outcome. A run takes about 12 seconds of one core, and twice that watched at each step.
"""
