// Calls that repeat an earlier one: what Python looks at in such a call, looked at in one function.
//
// Right after a kernel that filled the caches, a call misses them at every object and function that it touches: of a
// block of C 192 it took 60 us on an Emerald Rapids, a tenth of the kernel on one thread. This way touches less.
#pragma once

#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "bindings/support.h"

namespace cnk::bindings {

// Memory regions: address, bytes, whether to read all of them.
struct Regions {
  std::vector<std::tuple<Address, int64_t, bool>> regions;
  uint64_t checksum() const;
};

// A kernel with everything but tensors. It does not own the packed parameters.
class Launch {
 public:
  virtual ~Launch() = default;
  // Without the GIL. `between`: memory like out for a launch that needs it, or 0.
  virtual void run(Address x, Address out, Address between) const = 0;
};

// Calls of ops, each with what it found. The first argument of a call is x, the second a parameter. References that are
// kept: options, classes and weak references, but no tensor.
class Repeats {
 public:
  // settings: functions of what a call depends on beside its arguments. data_ptr, version: descriptors of
  // torch.Tensor. allocate: empty_strided(size, stride, dtype).
  Repeats(py::list settings, py::object data_ptr, py::object version, py::object allocate)
      : settings_(std::move(settings)),
        data_ptr_(std::move(data_ptr)),
        version_(std::move(version)),
        allocate_(std::move(allocate)) {}

  // arguments: the first `lead` are tensors or None. same(*tensors): whether tensors are like those of this call.
  // versions: of the parameters, -1 for one without. parameters: weak reference to what keeps the packed parameters of
  // the launch; they have not changed while `regions` have that checksum. size, stride, dtype: of the result.
  void add(const py::object& op, const py::tuple& arguments, size_t lead, py::object same,
           std::vector<Address> addresses, std::vector<int64_t> versions, py::object parameters,
           Regions regions, uint64_t checksum, std::shared_ptr<const Launch> launch, bool between,
           py::object size, py::object stride, py::object dtype);

  // The result, or None if no earlier call was like this one or a parameter has changed.
  py::object run(const py::object& op, const py::tuple& arguments) const;

 private:
  struct Call;
  std::vector<py::object> current_settings() const;
  bool unchanged(const Call& call, const std::vector<PyObject*>& tensors, Address& x) const;
  Address address(PyObject* tensor) const;

  py::list settings_;
  py::object data_ptr_, version_, allocate_;
  std::unordered_map<PyObject*, std::vector<std::shared_ptr<const Call>>> calls_;  // by the second argument
};

// What dictionaries contain and objects are: whether modules are what they were. In Python it takes 0.5 us a module, and
// twice that right after a kernel.
class Snapshot {
 public:
  // modules: whose classes count. attributes: dictionaries whose values must stay equal. nested: whose values must stay
  // the same objects. empty: what must stay empty.
  Snapshot(py::list modules, std::vector<py::dict> attributes, std::vector<py::dict> nested, py::list empty);

  bool holds() const;

 private:
  py::list modules_, empty_;
  std::vector<py::dict> attributes_, nested_;
  std::vector<py::object> types_, values_, objects_;
};

void bind_repeats(py::module_& m);

}  // namespace cnk::bindings
