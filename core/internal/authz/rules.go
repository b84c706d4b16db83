package authz

// Reach is how far a grant that is limited to objects goes.
type Reach uint8

// Reaches.
const (
	Whole  Reach = iota // the method is about the host, or makes something new: a grant with objects is not enough
	One                 // it names an object, which is asked for with [Rights.Object]
	Some                // it lists: what is not granted is left out of the answer
	Parent              // it makes a part of an object of kind [Rule.Parent], which it names
)

// Rule is what a method needs.
type Rule struct {
	Kind   string
	Verb   string
	Role   Role
	Reach  Reach
	Parent string // kind, with Reach Parent, or of what contains the object
}

// Rules has a rule for each method of mvirt.v1, by its full name in gRPC.
var Rules = map[string]Rule{
	"/mvirt.v1.System/GetStatus":   {Kind: "system", Verb: "read", Role: Viewer},
	"/mvirt.v1.System/WatchEvents": {Kind: "system", Verb: "read", Role: Viewer, Reach: Some},

	"/mvirt.v1.Plugins/List":    {Kind: "plugin", Verb: "read", Role: Viewer},
	"/mvirt.v1.Plugins/Get":     {Kind: "plugin", Verb: "read", Role: Viewer},
	"/mvirt.v1.Plugins/Restart": {Kind: "plugin", Verb: "restart", Role: Admin},

	"/mvirt.v1.Operations/List":   {Kind: "operation", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Operations/Get":    {Kind: "operation", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Operations/Watch":  {Kind: "operation", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Operations/Cancel": {Kind: "operation", Verb: "cancel", Role: Operator},

	"/mvirt.v1.Templates/Import":       {Kind: "template", Verb: "import", Role: Admin},
	"/mvirt.v1.Templates/ListImports":  {Kind: "template", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Templates/WatchImport":  {Kind: "template", Verb: "read", Role: Viewer},
	"/mvirt.v1.Templates/CancelImport": {Kind: "template", Verb: "import", Role: Admin},
	"/mvirt.v1.Templates/Create":       {Kind: "template", Verb: "create", Role: Admin},
	"/mvirt.v1.Templates/List":         {Kind: "template", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Templates/Get":          {Kind: "template", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.Templates/Rename":       {Kind: "template", Verb: "rename", Role: Admin, Reach: One},
	"/mvirt.v1.Templates/Delete":       {Kind: "template", Verb: "delete", Role: Admin, Reach: One},

	"/mvirt.v1.Volumes/Create": {Kind: "volume", Verb: "create", Role: Admin},
	"/mvirt.v1.Volumes/List":   {Kind: "volume", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Volumes/Get":    {Kind: "volume", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.Volumes/Resize": {Kind: "volume", Verb: "resize", Role: Admin, Reach: One},
	"/mvirt.v1.Volumes/Rename": {Kind: "volume", Verb: "rename", Role: Admin, Reach: One},
	"/mvirt.v1.Volumes/Delete": {Kind: "volume", Verb: "delete", Role: Admin, Reach: One},

	"/mvirt.v1.Snapshots/Create":   {Kind: "snapshot", Verb: "create", Role: Operator, Reach: Parent, Parent: "volume"},
	"/mvirt.v1.Snapshots/List":     {Kind: "snapshot", Verb: "read", Role: Viewer, Reach: Some, Parent: "volume"},
	"/mvirt.v1.Snapshots/Get":      {Kind: "snapshot", Verb: "read", Role: Viewer, Reach: One, Parent: "volume"},
	"/mvirt.v1.Snapshots/Rollback": {Kind: "snapshot", Verb: "rollback", Role: Admin, Reach: One, Parent: "volume"},
	"/mvirt.v1.Snapshots/Delete":   {Kind: "snapshot", Verb: "delete", Role: Admin, Reach: One, Parent: "volume"},

	"/mvirt.v1.Networks/Create": {Kind: "network", Verb: "create", Role: Admin},
	"/mvirt.v1.Networks/List":   {Kind: "network", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Networks/Get":    {Kind: "network", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.Networks/Update": {Kind: "network", Verb: "update", Role: Admin, Reach: One},
	"/mvirt.v1.Networks/Delete": {Kind: "network", Verb: "delete", Role: Admin, Reach: One},

	"/mvirt.v1.NICs/Create": {Kind: "nic", Verb: "create", Role: Admin},
	"/mvirt.v1.NICs/List":   {Kind: "nic", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.NICs/Get":    {Kind: "nic", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.NICs/Update": {Kind: "nic", Verb: "update", Role: Admin, Reach: One},
	"/mvirt.v1.NICs/Delete": {Kind: "nic", Verb: "delete", Role: Admin, Reach: One},

	"/mvirt.v1.SecurityGroups/Create":   {Kind: "security_group", Verb: "create", Role: Admin},
	"/mvirt.v1.SecurityGroups/List":     {Kind: "security_group", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.SecurityGroups/Get":      {Kind: "security_group", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.SecurityGroups/SetRules": {Kind: "security_group", Verb: "update", Role: Admin, Reach: One},
	"/mvirt.v1.SecurityGroups/Delete":   {Kind: "security_group", Verb: "delete", Role: Admin, Reach: One},

	"/mvirt.v1.VMs/Create":         {Kind: "vm", Verb: "create", Role: Admin},
	"/mvirt.v1.VMs/List":           {Kind: "vm", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.VMs/Get":            {Kind: "vm", Verb: "read", Role: Viewer, Reach: One},
	"/mvirt.v1.VMs/Update":         {Kind: "vm", Verb: "update", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/Delete":         {Kind: "vm", Verb: "delete", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/Start":          {Kind: "vm", Verb: "start", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Stop":           {Kind: "vm", Verb: "stop", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Kill":           {Kind: "vm", Verb: "kill", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Pause":          {Kind: "vm", Verb: "pause", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Resume":         {Kind: "vm", Verb: "resume", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Reboot":         {Kind: "vm", Verb: "reboot", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/Console":        {Kind: "vm", Verb: "console", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/AttachVolume":   {Kind: "vm", Verb: "attach_volume", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/DetachVolume":   {Kind: "vm", Verb: "detach_volume", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/AttachNIC":      {Kind: "vm", Verb: "attach_nic", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/DetachNIC":      {Kind: "vm", Verb: "detach_nic", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/Watch":          {Kind: "vm", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.VMs/Snapshot":       {Kind: "vm", Verb: "snapshot", Role: Operator, Reach: One},
	"/mvirt.v1.VMs/ListSnapshots":  {Kind: "vm", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.VMs/DeleteSnapshot": {Kind: "vm", Verb: "delete_snapshot", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/Restore":        {Kind: "vm", Verb: "restore", Role: Admin, Reach: One},
	"/mvirt.v1.VMs/Counters":       {Kind: "vm", Verb: "read", Role: Viewer, Reach: One},

	"/mvirt.v1.Logs/Query":  {Kind: "log", Verb: "read", Role: Viewer, Reach: Some},
	"/mvirt.v1.Logs/Stats":  {Kind: "log", Verb: "read", Role: Viewer},
	"/mvirt.v1.Logs/Verify": {Kind: "log", Verb: "verify", Role: Viewer},
}

// Verbs lists the verbs that grants can name.
func Verbs() map[string]bool {
	out := map[string]bool{}
	for _, r := range Rules {
		out[r.Verb] = true
	}
	return out
}
