"""What iterate plans and watches: recipes, stages, checks, stop rules, jobs."""
