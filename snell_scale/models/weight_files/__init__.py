"""Reading weights from files without running what they hold, and seeing whether they fit."""
