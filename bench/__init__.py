"""Our calls timed beside their rivals', and the report of a run."""
