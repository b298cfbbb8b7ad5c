import transfer as transfer  # before torch
