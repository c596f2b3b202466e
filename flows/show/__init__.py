"""What people look at: facts of a run, lines and live view of a terminal, report, export, debug dump."""
