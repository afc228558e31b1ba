"""One page about finished work: reads the records of runs, studies, merges, sweeps and matrices, and changes none."""
