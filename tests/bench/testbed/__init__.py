"""Small real training runs, healthy and failing, to measure alarms and guard on.

``recipes`` says what to train and which fault to inject, ``models`` builds it, ``inject_fault``
makes it fail, ``trainer`` trains it (watched, guarded, or neither), ``outcome`` decides from losses
alone whether and when it failed, ``bench`` runs and caches all of it.
"""
