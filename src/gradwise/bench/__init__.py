"""Which method wins on a given task, and does a paper's claim hold here: tasks, compare, statistics, claims, report."""
