"""Products with a narrow side, and the frozen product with one of them in its epilogue.

Every adapter of rank r is made of four products, whatever its name is: wide by narrow
(``shrink``), narrow by wide (``expand``), wide by narrow over the rows (``factor_grad``), and the
frozen product itself (``frozen_linear``). Each is one Triton kernel over client segments; what its
programs contribute to together is added up by one more (``add_parts``).
"""
