"""Block-level snapshots: thin pools in user space, Docker's image graph on them, honest write amplification."""
