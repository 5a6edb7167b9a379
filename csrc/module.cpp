// The only file that knows Python: names, checks, choice of device, release of the GIL.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) { m.doc() = "tracmod's native engine"; }
