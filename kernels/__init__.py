"""The PIFA operators, their references and their hardware forms."""

# In search of the PyPI package of that name, transformers imports whatever top-level `kernels` there is. With the root
# of a checkout on sys.path that is this folder, which must not define the operators a second time.
if __name__ != "kernels":
    from .basis_linear import basis_linear as basis_linear
    from .basis_linear import basis_linear_ref as basis_linear_ref
    from .grouped_linear import grouped_linear as grouped_linear
    from .grouped_linear import grouped_linear_ref as grouped_linear_ref
    from .linear import linear as linear
    from .linear import linear_ref as linear_ref
