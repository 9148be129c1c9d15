"""Quality benchmark: does one self-tuning run match the best run of a sweep?"""
