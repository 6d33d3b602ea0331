"""The exam of the judge: kernels whose verdict is known, by our rule and by those of others."""
