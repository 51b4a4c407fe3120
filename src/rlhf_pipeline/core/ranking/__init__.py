"""What rank is made of: scorers, judges, the columns and the report of rewards."""
