"""What a run's files say of it, for people: the page ``report.html`` and the model card of an export."""
