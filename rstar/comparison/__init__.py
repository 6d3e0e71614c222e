"""`rstar eval MODEL...`: any models, benchmarks and test-time methods side by side, and a PPM measured by itself."""
