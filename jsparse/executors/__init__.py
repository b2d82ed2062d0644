"""One executor per device; all compute the same function, and they alone import the kernel packages."""
