"""The PIFA operator, its reference and its hardware forms."""

# In search of the PyPI package of that name, transformers imports whatever top-level `kernels` there is. With the root
# of a checkout on sys.path that is this folder, which must not define the operator a second time.
if __name__ != "kernels":
    from .linear import linear as linear
    from .linear import linear_ref as linear_ref
