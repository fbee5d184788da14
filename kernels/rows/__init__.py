"""Operations on rows: norms, SiLU-mul, rotary embedding, and rounding to 8 bits."""
