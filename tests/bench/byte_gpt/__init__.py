"""Small GPTs over bytes that train for 400 steps, most of them with a fault.

``recipes`` says what to train, ``model`` builds it, ``faults`` makes it fail, ``train`` trains it (watched, guarded, or
neither), ``outcome`` decides from losses alone whether and when it failed and whether attention was
to blame, ``runs`` trains many and keeps them. A run takes about 12 seconds of one core.
"""
