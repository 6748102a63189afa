"""Building blocks without product knowledge: time, ids, backoff, tasks, groups."""
