"""One file per task; the file's name is the task's name, and its TASK is a `TaskSpec`."""
