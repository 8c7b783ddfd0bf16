"""Watch the trainers of other frameworks by a callback each."""
