"""What happened in a run, as data: records, tables, schedules and a picture."""
