"""What evaluate computes and report shows: tables, figures, words, pages."""
