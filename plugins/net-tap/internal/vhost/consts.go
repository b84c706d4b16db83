package vhost

// Requests of a front-end (the vhost-user protocol as QEMU's docs/interop/vhost-user.rst has it).
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	resetOwner          = 4
	setMemTable         = 5
	setLogBase          = 6
	setLogFD            = 7
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	getQueueNum         = 17
	setVringEnable      = 18
	netSetMTU           = 20
	setBackendFD        = 21
	getConfig           = 24
	setConfig           = 25
	getInflight         = 31
	setInflight         = 32
	resetDevice         = 34
	getMaxMemSlots      = 36
	addMemReg           = 37
	remMemReg           = 38
	setStatus           = 39
	getStatus           = 40
)

// Protocol features.
const (
	protoMQ        = 1 << 0
	protoReplyAck  = 1 << 3
	protoMTU       = 1 << 4
	protoBackend   = 1 << 5
	protoConfig    = 1 << 9
	protoInflight  = 1 << 12
	protoReset     = 1 << 13
	protoMemSlots  = 1 << 15
	protoStatus    = 1 << 16
	protoAll       = protoMQ | protoReplyAck | protoMTU | protoBackend | protoConfig | protoInflight | protoReset | protoMemSlots | protoStatus
	noFD           = 1 << 8 // in SET_VRING_KICK, CALL and ERR: there is no descriptor
	flagVersion    = 1
	flagReply      = 1 << 2
	flagNeedReply  = 1 << 3
	headerLen      = 12
	maxPayload     = 4096
	maxMessageFDs  = 16
	configHeader   = 12
	configMax      = 256
	inflightAlign  = 64
	inflightPerReq = 16
	inflightHeader = 16
)

// Device features (virtio 1.2, section 5.1.3 and 6).
const (
	fCsum       = 1 << 0
	fGuestCsum  = 1 << 1
	fMTU        = 1 << 3
	fMAC        = 1 << 5
	fGuestTSO4  = 1 << 7
	fGuestTSO6  = 1 << 8
	fGuestECN   = 1 << 9
	fHostTSO4   = 1 << 11
	fHostTSO6   = 1 << 12
	fHostECN    = 1 << 13
	fMrgRxbuf   = 1 << 15
	fStatus     = 1 << 16
	fMQ         = 1 << 22
	fAnyLayout  = 1 << 27
	fIndirect   = 1 << 28
	fEventIdx   = 1 << 29
	fProtocol   = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	fVersion1   = 1 << 32
	fAll        = fCsum | fGuestCsum | fMTU | fMAC | fGuestTSO4 | fGuestTSO6 | fGuestECN | fHostTSO4 | fHostTSO6 | fHostECN | fMrgRxbuf | fStatus | fMQ | fAnyLayout | fIndirect | fEventIdx | fProtocol | fVersion1
	statusUp    = 1
	statusReset = 0

	configChanged = 2 // what a back-end says on its own channel: read the configuration again
)
