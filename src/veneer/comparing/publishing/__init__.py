"""From the records of runs to the lines and the summary that a compare folder holds."""
