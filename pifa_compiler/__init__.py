from . import registration

registration.install()
