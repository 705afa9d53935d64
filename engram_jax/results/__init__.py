"""What finished runs say together: intervals, fits, tables, figures, comparisons."""
