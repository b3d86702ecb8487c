"""Scripts that train on real data; their modules and DataModules are also named by ``configs/*.yaml``."""
