"""One step of all matrices, where the stages do not run one by one."""
