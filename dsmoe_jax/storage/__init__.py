"""Files of a run where several machines see them: on a mounted file system, or in a bucket."""
