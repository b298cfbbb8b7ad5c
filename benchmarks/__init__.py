import transfer  # noqa: F401  it sets OpenMP's variables, which must precede torch
