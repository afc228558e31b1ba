"""Many adapters into one: methods, transforms and coefficients on updates, module by module (MATH section 6)."""
